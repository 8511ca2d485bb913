"""Subcommands of ``fasa`` that belong to the runtime."""
