"""The subcommands ``fasa serve``, ``fasa calibrate`` and ``fasa doctor``."""
