// The forward pass of model.py and modern.py, one token at a time, with a KV cache; and the choice of the next token.
//
// The same seed gives the same story in every browser. So nothing here is Math.exp, tanh, log, sin or cos, whose last
// digits differ between browsers: + - * / and Math.sqrt are exact everywhere.
//
// C: n_embd, H: n_head, D: C / H, T: block_size, V: rows of the token embedding. A matrix is a list of its rows.
"use strict"

class GPT {
  // config: GPTConfig, and `tokens`: the token of each row of the embedding, or null if all have their own. If they are
  // fewer than the rows, the last row is that of all other tokens, which are never chosen.
  // tensors: name, dtype and shape [columns, rows] of the weights; buffer: their numbers. Scales precede int8.
  constructor(config, tensors, buffer) {
    Object.assign(this, config, {length: 0, start: 0, window: []})
    const {n_layer: L, n_head: H, n_embd: C, block_size: T, vocab_size} = config, D = C / H
    this.tokens ??= Array.from({length: vocab_size}, (_, token) => token)
    this.rowOf = new Int32Array(vocab_size).fill(this.tokens.length)
    this.tokens.forEach((token, row) => { this.rowOf[token] = row })
    const heads = Array.from({length: L * H}), shapes = tensors.map(([, , columns, rows = 0]) => [columns, rows])
    this.matrices = new Matrices([...shapes, ...heads.flatMap(() => [[D, T], [T, D]])])
    this.weights = unpack(tensors, buffer, this.matrices)
    this.keys = heads.map(() => this.matrices.make(D, T))  // of each layer and head
    this.values = heads.map(() => this.matrices.make(T, D))  // transposed
  }

  // Reads the tokens of the context window that are not in the cache yet, one in each iteration, so that a page can do
  // something else in between. Afterwards, `logits` (V) are those of the token that follows.
  *read(tokens) {
    const start = windowStart(tokens.length, this.block_size), window = tokens.slice(start)
    let known = 0  // tokens that the cache has: none if the window has moved, because their positions have changed
    while (start === this.start && known < this.length && this.window[known] === window[known]) known++
    Object.assign(this, {start, window, length: Math.min(known, window.length - 1)})
    while (this.length < window.length) {
      this.attention = []  // of the last token: for each layer and head, how much it attends to each token so far
      this.x = this.step(window[this.length])  // (C)
      yield
    }
    this.logits = this.linear("wte", this.norm("ln_f", this.x))
  }

  // The output of the last block for a token, (C), which follows the tokens in the cache and joins them.
  step(token) {
    const {weights, n_embd: C} = this, modern = this.architecture === "modern", row = this.rowOf[token]
    const x = Float64Array.from(weights.wte.row(row))  // (C)
    if (!modern) add(x, weights.wpe.row(this.length))
    for (let l = 0; l < this.n_layer; l++) {
      const layer = name => `h.${l}.${name}`
      const qkv = this.linear(layer("attn.c_attn"), this.norm(layer("ln_1"), x))  // (3C)
      const value = weights[`ve.${l}`]?.row(token)  // (C)
      if (value) for (let i = 0; i < C; i++) qkv[2 * C + i] += 16 * value[i]  // VALUE_SCALE of modern.py
      add(x, this.linear(layer("attn.c_proj"), this.attend(l, qkv)))
      const hidden = this.linear(layer("mlp.c_fc"), this.norm(layer("ln_2"), x))  // (4C)
      add(x, this.linear(layer("mlp.c_proj"), hidden.map(this.gelu === "tanh" ? geluTanh : geluExact)))
    }
    this.length++
    return x
  }

  // Attention of the newest token to all tokens so far: queries, keys and values (3C) -> (C).
  attend(l, qkv) {
    const {n_head: H, n_embd: C, length: t} = this, D = C / H, y = new Float64Array(C)
    for (let h = 0; h < H; h++) {
      let [q, k, v] = [0, C, 2 * C].map(part => qkv.subarray(part + h * D, part + (h + 1) * D))  // (D) each
      if (this.architecture === "modern") [q, k] = [this.rotate(normalize(q)), this.rotate(normalize(k))]
      const keys = this.keys[l * H + h], values = this.values[l * H + h]  // (T, D), (D, T)
      keys.row(t).set(k)
      for (let i = 0; i < D; i++) values.data[i * values.stride + t] = v[i]
      const weights = softmax(this.matrices.linear(keys, q, t + 1).map(score => score / Math.sqrt(D)))  // (t + 1)
      this.attention[l * H + h] = weights
      y.set(this.matrices.linear(values, weights), h * D)
    }
    return y
  }

  // Rotary positions: turns the pairs (x[i], x[i + D / 2]) by angles whose cosines and sines are in the page's data.
  rotate(x) {
    const half = x.length / 2, cos = this.weights.cos.row(this.length), sin = this.weights.sin.row(this.length)  // (D / 2)
    const y = new Float64Array(x.length)
    for (let i = 0; i < half; i++) {
      y[i] = x[i] * cos[i] - x[i + half] * sin[i]
      y[i + half] = x[i + half] * cos[i] + x[i] * sin[i]
    }
    return y
  }

  linear(name, x) {
    const y = this.matrices.linear(this.weights[name], x), bias = this.weights[`${name}.bias`]
    return bias ? add(y, bias) : y
  }

  // Layer norm. Those of modern.py have no parameters, except for the last one; biases are a setting.
  norm(name, x) {
    const y = normalize(x), weight = this.weights[name], bias = this.weights[`${name}.bias`]
    if (weight) for (let i = 0; i < y.length; i++) y[i] *= weight[i]
    return bias ? add(y, bias) : y
  }
}

// The weights, name -> vector or matrix.
function unpack(tensors, buffer, matrices) {
  let at = 0
  const take = (Type, length) => {
    const part = new Type(buffer, at, length)
    at += padded(part.byteLength)  // a Float32Array begins at a multiple of four bytes
    return part
  }
  return Object.fromEntries(tensors.map(([name, dtype, columns, rows]) => {
    if (!rows) return [name, take(Float32Array, columns)]
    const scales = dtype === "int8" ? take(Float32Array, rows) : null
    const numbers = take(scales ? Int8Array : Float32Array, rows * columns), matrix = matrices.make(columns, rows)
    for (let r = 0; r < rows; r++) {
      const row = matrix.row(r)
      row.set(numbers.subarray(r * columns, (r + 1) * columns))
      if (scales) for (let i = 0; i < columns; i++) row[i] *= scales[r]
    }
    return [name, matrix]
  }))
}

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i]
  return x
}

function normalize(x) {
  let mean = 0, variance = 0
  for (let i = 0; i < x.length; i++) mean += x[i] / x.length
  for (let i = 0; i < x.length; i++) variance += (x[i] - mean) * (x[i] - mean) / x.length
  const scale = 1 / Math.sqrt(variance + 1e-5), y = new Float64Array(x.length)
  for (let i = 0; i < x.length; i++) y[i] = (x[i] - mean) * scale
  return y
}

function softmax(x) {
  let max = -Infinity, sum = 0
  for (let i = 0; i < x.length; i++) if (x[i] > max) max = x[i]
  const y = new Float64Array(x.length)
  for (let i = 0; i < x.length; i++) sum += y[i] = exp(x[i] - max)
  for (let i = 0; i < x.length; i++) y[i] /= sum
  return y
}

// e^x = (e^(x / 256))^256, the inner one by its series.
function exp(x) {
  if (x < -700) return 0
  const r = x / 256
  let y = 1 + r * (1 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720))))))
  for (let i = 0; i < 8; i++) y *= y
  return y
}

// x / 2 * (1 + tanh(u)), and 1 + tanh(u) is 2 / (1 + e^-2u)
function geluTanh(x) {
  return x / (1 + exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))  // 2 * sqrt(2 / pi)
}

// x times the probability that a normal variable is below x, by its series: all terms have one sign.
function geluExact(x) {
  if (x < -6 || x > 6) return x > 0 ? x : 0
  let term = x, sum = x
  for (let n = 3; n < 200 && term * term > 1e-24; n += 2) sum += term *= x * x / n
  return x * (0.5 + 0.3989422804014327 * exp(-x * x / 2) * sum)  // 1 / sqrt(2 pi)
}

// Where the context window of n tokens begins: after a full block it advances by half a block (storygpt/generate.py).
function windowStart(n, T) {
  const half = Math.floor(T / 2)
  return n <= T ? 0 : half * Math.ceil((n - T) / half)
}

// The k largest of some numbers: their indices, the largest first.
function largest(numbers, k) {
  const threshold = numbers.length > k ? numbers.slice().sort()[numbers.length - k] : -Infinity
  const found = []
  for (let i = 0; i < numbers.length; i++) if (numbers[i] >= threshold) found.push(i)
  return found.sort((a, b) => numbers[b] - numbers[a] || a - b).slice(0, k)
}

// One of the rows `top`, the most likely ones; `random` is from 0 up to 1. At temperature 0 it is the first.
function sample(logits, top, temperature, random) {
  const weights = top.map(row => temperature < 1e-6 ? 0 : exp((logits[row] - logits[top[0]]) / temperature))
  let threshold = random * weights.reduce((a, b) => a + b)
  const chosen = weights.findIndex(weight => (threshold -= weight) < 0)
  return top[Math.max(chosen, 0)]
}

// A random number from 0 up to 1 for each position of the story with each seed: a hash of the two (MurmurHash3's).
function random(seed, position) {
  const hash = h => {
    h = Math.imul(h ^ h >>> 16, 0x85ebca6b)
    h = Math.imul(h ^ h >>> 13, 0xc2b2ae35)
    return h ^ h >>> 16
  }
  return (hash(hash(seed + 1) + position) >>> 0) / 2 ** 32
}
