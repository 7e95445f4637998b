"""TinyStories without a GPU: the published model's blocks, a small vocabulary, few tokens.

python prepare.py --tokenizer bpe:4096 && python train.py config/tinystories_cpu.py
"""

dataset = "tinystories-bpe4096"  # with GPT-2's 50,257 tokens the output head is two thirds of the arithmetic

n_layer = 6
n_head = 6
n_embd = 384
block_size = 128
dropout = 0.0  # a fraction of an epoch cannot overfit

# Small batches: while the loss still falls fast, many steps matter more than precise gradients. A batch of 8 gives a
# lower loss per token, but Muon takes as long for a step of any batch size, and here time counts.
batch_size = 16  # 2,048 tokens per step
gradient_accumulation_steps = 1
max_tokens = 3_072_000

# From config/tinystories_fast.py, where these were tuned.
optimizer = "muon"
muon_lr = 0.02
learning_rate = 6e-3
beta2 = 0.999
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
weight_decay = 0.0
grad_clip = 1.0

eval_interval = 250
eval_iters = 20
