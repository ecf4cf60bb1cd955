"""The ecosystem's own plug-in points, one file each."""
