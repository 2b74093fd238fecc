"""Parts of the app; MONAI Label reloads what is called ``lib``."""
