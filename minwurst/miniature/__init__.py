"""A whole Würstchen small enough for a laptop, trained on emoji; `pretrain` is its recipe."""
