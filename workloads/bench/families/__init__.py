"""``fasa bench families``: serve a tiny model of every family, and compare sparse with dense."""
