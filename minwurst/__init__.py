"""minwurst: fine-tune Würstchen v2's prior with a training loop that fits on one page."""
