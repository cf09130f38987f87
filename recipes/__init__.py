"""What a person launches. Installed, this folder is the package molmo2_nemo.recipes."""
