"""Finding and opening images, and turning them into tensors."""
from .._lazy import exports

__all__, __getattr__, __dir__ = exports(__name__, {
    'images': ['ImageFolder', 'Split', 'find_split', 'image_transform', 'load_image', 'prepare_image'],
    'image_stream': ['OpenedImage', 'Source', 'find_images', 'open_images'],
    'label_map': ['LabelMap', 'read_label_map'],
    'digits': ['read_digits', 'write_digits'],
    'composed_digits': ['write_composed_digits'],
})
