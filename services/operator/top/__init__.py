"""`fanwire top`: streams, exporters and collectors, live; `views` and `state` decide, `screen` draws."""
