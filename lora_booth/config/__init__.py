"""Settings: declared, checked, read, shipped as presets. Neither torch nor runs."""
