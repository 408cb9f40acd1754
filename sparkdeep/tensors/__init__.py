"""A module as one flat vector, vectors as bytes, the exact mean.

- `encoding.py`: codecs of vectors: identity, bf16, int8 by blocks
- `mean.py`: the exact weighted mean, and pooled BatchNorm statistics
- `parameters.py`: a module as one flat vector
- `pooling.py`: state beside the trained parameters, of all replicas, becomes one
- `state_dicts.py`: state dicts as safetensors
"""
