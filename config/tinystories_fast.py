"""The published 30M model with a low loss per token: 3.28 M tokens, a twenty-fifth of the published 81.9 M.

python prepare.py && python train.py config/tinystories_fast.py

docs/recipes.md has what was tried, what was not, and the results. With another budget (--max_tokens=8_100_000,
--max_minutes=60) the learning-rate schedule follows it.
"""

dataset = "tinystories"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 128
dropout = 0.0  # a part of an epoch cannot overfit
bias = True
init_embeddings = "cooccurrence"

# Many small steps: 1,024 tokens each, where the published recipe has 131,072.
batch_size = 8
gradient_accumulation_steps = 1
max_tokens = 3_276_800

optimizer = "muon"
muon_lr = 0.01  # the longer the run, the lower the best one (docs/recipes.md)
learning_rate = 6e-3  # AdamW's, so mostly that of the embeddings
beta2 = 0.999  # the large gradients of a rare token are many steps apart (docs/recipes.md)
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
weight_decay = 0.0
grad_clip = 1.0

eval_interval = 200
