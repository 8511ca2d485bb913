"""Errors a user can cause. Each message says what, expected, got, and the way out."""


class FasaError(Exception):
    """Base of every error raised for a user's benefit."""


class ConfigError(FasaError, ValueError):
    """A server configuration that cannot be used."""


class RequestError(FasaError, ValueError):
    """A request whose FASA parameters cannot be served; SGLang answers it with HTTP 400."""


class CalibrationError(FasaError, ValueError):
    """A calibration file, or the input of a calibration, that cannot be used."""


class CalibrationMismatchError(CalibrationError):
    """A calibration file that belongs to another model."""


class UnsupportedModelError(FasaError, ValueError):
    """A model whose attention FASA does not cover."""


class UnsupportedHostError(FasaError, RuntimeError):
    """An SGLang version, device or server flag that FASA does not work with."""
