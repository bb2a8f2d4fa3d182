"""Settings: declared, checked, read from TOML and the command line, shipped as presets. Neither torch nor runs."""
