# Written anew by the image's build, from the wheel it was told to install.
__version__ = "0"
