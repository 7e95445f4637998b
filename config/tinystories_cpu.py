"""Real TinyStories on a machine without a GPU: the published body, a small vocabulary, a recipe for few tokens.

python prepare.py --tokenizer bpe:4096 && python train.py config/tinystories_cpu.py
"""

dataset = "tinystories-bpe4096"  # with GPT-2's 50,257 tokens the head alone would be two thirds of the arithmetic

n_layer = 6
n_head = 6
n_embd = 384
block_size = 128
dropout = 0.0  # a fraction of one epoch cannot be learnt by heart

# Small batches: while the loss still falls fast, many updates matter more than smooth gradients. Half as large ones
# learn more from each token, but Muon's own step takes as long for any batch, and here the minutes count.
batch_size = 16  # 2,048 tokens an update
gradient_accumulation_steps = 1
max_tokens = 3_072_000

# As in config/tinystories_fast.py, for which they were found.
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
