"""rsmtdf_cli: the command line. The only package that prints."""
