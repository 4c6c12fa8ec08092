"""Settings, TOML, overrides."""
