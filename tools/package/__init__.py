"""The packages: `python -m tools.package` makes a .deb and an .rpm of this checkout; packaging/ has what they are made from."""
