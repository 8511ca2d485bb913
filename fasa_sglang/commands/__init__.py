"""The subcommands ``fasa serve`` and ``fasa doctor``."""
