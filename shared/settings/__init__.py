"""The settings: each declared once (`model`), read from file and environment (`file`)."""
