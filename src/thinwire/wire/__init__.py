"""Bytes: the patch container, entropy coders, position and value codecs, manifests. Opens nothing, reads no clock."""
