"""Modules of extracted models: attention whose query-key and value-output widths differ."""
