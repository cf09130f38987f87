"""Programs around a run. Installed, this folder is the package molmo2_nemo.tools."""
