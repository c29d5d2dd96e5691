"""Training, evaluating and using segmenters; needs the extra `segmentation`."""
from .._lazy import exports

__all__, __getattr__, __dir__ = exports(__name__, {
    'settings': ['SegmentSettings'],
    'train': ['SegmentResult', 'create_segmenter', 'train_segmenter'],
    'datasets': ['CocoPanopticStuff', 'CocoStuff', 'FolderDataset', 'LookIntoPerson', 'SegmentationDataset',
        'load_dataset'],
    'transforms': ['eval_transform', 'train_transform'],
    'label_counts': ['LabelCounts', 'count_labels'],
    'metrics': ['SegmentMetrics', 'evaluate', 'segment'],
    'predict': ['Segmented', 'draw_overlay', 'palette', 'predict_classes', 'predict_files'],
})
