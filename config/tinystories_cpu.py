"""Real TinyStories on a machine without a GPU: the published body, a small vocabulary, a sane schedule.

python prepare.py --tokenizer bpe:4096 && python train.py config/tinystories_cpu.py
"""

dataset = "tinystories-bpe4096"  # with GPT-2's 50,257 tokens the head alone would be two thirds of the arithmetic

n_layer = 6
n_head = 6
n_embd = 384
block_size = 128
dropout = 0.0  # a fraction of one epoch cannot be learnt by heart

# Small batches: while the loss still falls fast, many updates matter more than smooth gradients.
batch_size = 16  # 2,048 tokens an update
gradient_accumulation_steps = 1
max_iters = 3_000  # 6.1 M tokens

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99
grad_clip = 1.0

eval_interval = 500
eval_iters = 20
