"""Folders of pictures, and how a picture becomes a tensor."""
