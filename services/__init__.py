"""The processes: one package each, importing only itself and `shared`."""
