"""TinyStories on two CPU cores in an hour (docs/speedrun.md).

python prepare.py --tokenizer bpe:4096 && python train.py config/tinystories_cpu_1h.py
"""

dataset = "tinystories-bpe4096"  # with GPT-2's 50,257 tokens most of the arithmetic would be in the output head

architecture = "modern"
n_layer = 6
n_head = 4
n_embd = 256
block_size = 1024  # few stories are cut by its start; attention reaches back 128 tokens (modern.py)
bias = False
dropout = 0.0  # on two EPYC cores about two epochs of a fiftieth of TinyStories; dropout was not tried
init_embeddings = "cooccurrence"

batch_size = 4  # 4,096 tokens per step
gradient_accumulation_steps = 1
max_minutes = 59

optimizer = "muon"
muon_lr = 0.02
learning_rate = 6e-3  # AdamW's, for the embeddings
beta2 = 0.999  # the large gradients of a rare token are many steps apart (docs/recipes.md)
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.1  # three epochs of another model gained 0.006 bits per byte (docs/speedrun.md)
grad_clip = 1.0

eval_interval = 500
eval_iters = 10
