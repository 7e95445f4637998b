"""The published 30M model, learning as much as it can from each token: 3.28 M of them, a twenty-fifth of 81.9 M.

python prepare.py && python train.py config/tinystories_fast.py

docs/recipes.md has what was tried, what was not, and what came of it. A new run with another budget
(--max_tokens=8_100_000, --max_minutes=60) has its whole schedule in that: the learning rate follows the budget.
"""

dataset = "tinystories"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 128
dropout = 0.0  # a part of one epoch cannot be learnt by heart
bias = True

# Many small updates: of 1,024 tokens, where the published recipe's have 131,072.
batch_size = 8
gradient_accumulation_steps = 1
max_tokens = 3_276_800

optimizer = "muon"
muon_lr = 0.02
learning_rate = 6e-3  # of AdamW, so mostly of the embeddings
beta2 = 0.999  # a rare token's large gradients are far apart; docs/recipes.md has the gain, and more of the guess
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
weight_decay = 0.0
grad_clip = 1.0

eval_interval = 200
