"""The plug-in points of other libraries, one file each."""
