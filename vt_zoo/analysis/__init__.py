"""Analysis of models: what their tokens attend to, and what they cost."""
from .._lazy import exports

__all__, __getattr__, __dir__ = exports(__name__, {
    'records': ['VTRecord', 'capture_tokens'],
    'metrics': ['attention_correlation', 'attention_entropy', 'attention_spread', 'effective_rank',
        'foreground_ratio', 'foreground_share', 'interaction_map', 'locality', 'record_interaction',
        'resize_attention', 'token_cosine', 'token_similarity', 'uniform_locality'],
    'figures': ['draw_interaction', 'draw_locality', 'draw_token', 'draw_token_attention', 'overlay_tokens'],
    'cost': ['count_multiply_adds', 'count_weights'],
    'vit_attention': ['capture_self_attention', 'patch_grid'],
    'explorer': ['create_app'],
})
