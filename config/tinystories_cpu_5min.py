"""TinyStories on two CPU cores in five minutes (docs/speedrun.md): the speedrun's model trained longer.

python prepare.py --tokenizer bpe:4096 && python train.py config/tinystories_cpu_5min.py
"""

dataset = "tinystories-bpe4096"  # with GPT-2's 50,257 tokens most of the arithmetic would be in the output head

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
max_minutes = 4.75

optimizer = "muon"
muon_lr = 0.02
learning_rate = 6e-3  # AdamW's, for the embeddings
beta2 = 0.999  # the large gradients of a rare token are many steps apart (docs/recipes.md)
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.0
grad_clip = 1.0

eval_interval = 1000
eval_iters = 20
