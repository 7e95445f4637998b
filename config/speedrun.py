"""The speedrun: 0.815 bits per byte on two CPU cores in the least time (docs/speedrun.md).

python prepare.py --tokenizer bpe:4096 && python train.py config/speedrun.py

For better stories in ten minutes or an hour: config/tinystories_cpu.py, config/tinystories_cpu_1h.py.
"""

dataset = "tinystories-bpe4096"

# A small model learns more per second than a large one until its capacity is used up.
architecture = "modern"
n_layer = 4
n_head = 2
n_embd = 128
block_size = 1024  # few stories are cut by its start; attention reaches back 128 tokens (modern.py)
bias = False
dropout = 0.0  # a part of an epoch cannot overfit
init_embeddings = "cooccurrence"

batch_size = 2  # 2,048 tokens per step
gradient_accumulation_steps = 1
max_tokens = 1_780_000

optimizer = "muon"
muon_lr = 0.02
learning_rate = 9e-3  # AdamW's: that of the embeddings
beta2 = 0.999
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.0
grad_clip = 1.0

eval_interval = 1_000_000  # only at the end: evaluations count as time
eval_iters = 20
