"""A tiny model on the embedded corpus: from nothing to a story in about two minutes on a laptop's CPU.

python prepare.py nursery --tokenizer bpe:1024 && python train.py config/quickstart.py
"""

dataset = "nursery-bpe1024"

n_layer = 4  # 2.0 M parameters
n_head = 4
n_embd = 192
block_size = 256  # most stories of the corpus fit whole
dropout = 0.0

batch_size = 8  # 2,048 tokens an update
gradient_accumulation_steps = 1
max_iters = 500

learning_rate = 2e-3
min_lr = 1e-4
warmup_iters = 50
grad_clip = 1.0

eval_interval = 125
eval_iters = 20
log_interval = 25

compile = False  # compiling would take longer than it saves
