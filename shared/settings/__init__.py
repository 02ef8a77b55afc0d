"""The settings: each declared once, in `tables` or `entries`; together in `model`; read from file and environment."""
