"""Errors that a user can cause. A message says what, expected, got, and the way out."""


class FasaError(Exception):
    """Base class; its message is meant for the user."""


class ConfigError(FasaError, ValueError):
    """A setting of the server is invalid."""


class RequestError(FasaError, ValueError):
    """A request's FASA parameters are invalid; SGLang answers it with HTTP 400."""


class CalibrationError(FasaError, ValueError):
    """A calibration file, or the input of a calibration, is invalid."""


class CalibrationMismatchError(CalibrationError):
    """A calibration file belongs to another model."""


class UnsupportedModelError(FasaError, ValueError):
    """FASA does not support the model's attention."""


class UnsupportedHostError(FasaError, RuntimeError):
    """FASA does not work with the SGLang version, the device or a server flag."""
