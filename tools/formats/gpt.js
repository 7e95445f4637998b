// The forward pass of model.py and modern.py, one token at a time with a KV cache, and the choice of the next token.
// The same seed gives the same story in every browser: only + - * / and Math.sqrt are exact everywhere, not Math.exp.
// C: n_embd, H: n_head, D: C / H, T: block_size, V: rows of the embedding. Matrices: see linear.js.
"use strict"

class GPT {
  // tensors: [name, columns, rows] of weights; a vector has no rows. tokens: the token of each row of the embedding;
  // if they are fewer than the rows, the last row is that of all other tokens, which did not occur in training.
  constructor({config, tensors, tokens, dtype}, buffer) {
    Object.assign(this, config, {length: 0, start: 0, window: []})
    this.tokens = tokens ?? Array.from({length: this.vocab_size}, (_, token) => token)
    this.rowOf = new Map(this.tokens.map((token, row) => [token, row]))
    const D = this.n_embd / this.n_head, heads = Array.from({length: this.n_layer * this.n_head})
    const T = this.block_size, shapes = tensors.map(([, columns, rows = 0]) => [rows, columns])
    const memory = new Memory([...shapes, ...heads.flatMap(() => [[T, D], [D, T]])])
    this.weights = unpack(tensors, dtype, buffer, memory)
    this.keys = heads.map(() => memory.matrix(T, D))
    this.values = heads.map(() => memory.matrix(D, T))  // transposed
    this.activation = this.architecture === "modern" ? reluSquared : this.gelu === "tanh" ? geluTanh : geluExact
  }

  // Reads the tokens of the context window that are not in the cache, one an iteration, so that a page can react in
  // between. Afterwards `logits` (V) are those of the next token. When the window moves, it is read anew.
  *read(tokens) {
    const start = windowStart(tokens.length, this.block_size), window = tokens.slice(start)
    let known = 0
    while (start === this.start && known < this.length && this.window[known] === window[known]) known++
    Object.assign(this, {start, window, length: Math.min(known, window.length - 1)})
    for (let x; this.length < window.length; this.length++) {
      x = this.step(window[this.length])
      if (this.length + 1 === window.length) this.logits = linear(norm(x, ...this.part("ln_f")), this.weights.wte)
      yield
    }
  }

  part(name) { return [this.weights[name], this.weights[`${name}.bias`]] }
  row(token) { return this.rowOf.get(token) ?? this.tokens.length }

  // The output of the last block for the token that follows those in the cache: (C)
  step(token) {
    const {weights, n_embd: C} = this, x = Float64Array.from(weights.wte.row(this.row(token)))  // (C)
    if (weights.wpe) add(x, weights.wpe.row(this.length))
    this.attention = []  // for each layer and head: how much the token attends to each one so far
    for (let l = 0; l < this.n_layer; l++) {
      const part = name => this.part(`h.${l}.${name}`)
      const input = norm(x, ...part("ln_1"))  // (C)
      const qkv = linear(input, ...part("attn.c_attn"))  // (3C)
      const values = weights.ve?.row(token)  // (C) of each block
      if (values) for (let i = 0; i < C; i++) qkv[2 * C + i] += 16 * values[l * C + i]  // VALUE_SCALE of modern.py
      const gates = weights[`h.${l}.attn.gate`] && linear(input, ...part("attn.gate"))  // modern.py: (H)
      add(x, linear(this.attend(qkv, gates, l), ...part("attn.c_proj")))
      const hidden = linear(norm(x, ...part("ln_2")), ...part("mlp.c_fc"))  // (4C)
      add(x, linear(hidden.map(this.activation), ...part("mlp.c_proj")))
    }
    return x
  }

  // Queries, keys and values of a token, (3C), and inputs of its gates, (H) or none -> what its heads found, (C).
  attend(qkv, gates, l) {
    const {n_head: H, n_embd: C, length: t, weights: {cos, sin}} = this, D = C / H, y = new Float64Array(C)
    for (let h = 0; h < H; h++) {
      let [q, k, v] = [0, C, 2 * C].map(start => qkv.subarray(start + h * D, start + (h + 1) * D))  // (D) each
      const keys = this.keys[l * H + h], values = this.values[l * H + h]  // (T, D), (D, T)
      if (cos) {  // modern.py
        [q, k] = [q, k].map(x => rotate(norm(x), cos.row(t), sin.row(t)))
        if (t + 1 < keys.rows) keys.row(t + 1).set(k.subarray(D / 2), D / 2)
        k = k.subarray(0, D / 2)
      }
      keys.row(t).set(k)
      for (let i = 0; i < D; i++) values.row(i)[t] = v[i]
      const scores = linear(q, keys, null, t + 1)  // (t + 1)
      if (cos) scores.fill(-Infinity, 0, Math.max(0, t + 1 - 128))  // WINDOW of modern.py
      const weights = softmax(scores.map(score => score / Math.sqrt(D)))
      this.attention.push(weights)
      const factor = gates ? 2 / (1 + exp(-gates[h])) : 1
      y.set(linear(weights, values).map(value => factor * value), h * D)
    }
    return y
  }
}

// name -> vector or matrix. In the buffer, the scales of the rows of a matrix come before its int8.
function unpack(tensors, dtype, buffer, memory) {
  let at = 0
  const take = (Type, length) => {
    const part = new Type(buffer, at, length)
    at += Math.ceil(part.byteLength / 4) * 4  // a Float32Array begins at a multiple of 4 bytes
    return part
  }
  return Object.fromEntries(tensors.map(([name, columns, rows, isTable]) => {
    if (!rows) return [name, take(Float32Array, columns)]
    const scales = dtype === "int8" && !isTable && take(Float32Array, rows)
    const flat = take(scales ? Int8Array : Float32Array, rows * columns)
    const matrix = memory.matrix(rows, columns)
    for (let r = 0; r < rows; r++) {
      const row = matrix.row(r)
      row.set(flat.subarray(r * columns, (r + 1) * columns))
      if (scales) for (let i = 0; i < columns; i++) row[i] *= scales[r]
    }
    return [name, matrix]
  }))
}

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i]
  return x
}

// Layer norm, without parameters in most places of modern.py.
function norm(x, weight, bias) {
  let mean = 0, variance = 0
  for (let i = 0; i < x.length; i++) mean += x[i] / x.length
  for (let i = 0; i < x.length; i++) variance += (x[i] - mean) * (x[i] - mean) / x.length
  const scale = 1 / Math.sqrt(variance + 1e-5), y = new Float64Array(x.length)
  for (let i = 0; i < x.length; i++) y[i] = (x[i] - mean) * scale * (weight ? weight[i] : 1) + (bias ? bias[i] : 0)
  return y
}

// Rotary positions in the first half of x (D), cos and sin (D / 4) -> (D)
function rotate(x, cos, sin) {
  const half = cos.length, y = Float64Array.from(x)
  for (let i = 0; i < half; i++) {
    y[i] = x[i] * cos[i] - x[i + half] * sin[i]
    y[i + half] = x[i + half] * cos[i] + x[i] * sin[i]
  }
  return y
}

function softmax(x) {
  const max = x.reduce((a, b) => a > b ? a : b), y = new Float64Array(x.length)
  let sum = 0
  for (let i = 0; i < x.length; i++) sum += y[i] = exp(x[i] - max)
  return y.map(value => value / sum)
}

function exp(x) {  // (e^(x / 256))^256, the inner one by its series
  if (x < -700) return 0
  const r = x / 256
  let y = 1 + r * (1 + r * (1 / 2 + r * (1 / 6 + r * (1 / 24 + r * (1 / 120 + r * (1 / 720))))))
  for (let i = 0; i < 8; i++) y *= y
  return y
}

function geluTanh(x) {  // x / 2 * (1 + tanh(u)), where 1 + tanh(u) = 2 / (1 + e^-2u)
  return x / (1 + exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))  // 2 * sqrt(2 / pi)
}

function reluSquared(x) { return x > 0 ? x * x : 0 }

function geluExact(x) {  // x times the probability that a standard normal variable is below x, by its series
  if (x < -6 || x > 6) return x > 0 ? x : 0
  let term = x, sum = x
  for (let n = 3; n < 200 && term * term > 1e-24; n += 2) sum += term *= x * x / n
  return x * (0.5 + 0.3989422804014327 * exp(-x * x / 2) * sum)  // 1 / sqrt(2 * pi)
}

function windowStart(n, T) {  // as in storygpt/generate.py
  const half = Math.floor(T / 2)
  return n <= T ? 0 : half * Math.ceil((n - T) / half)
}

// The indices of the k largest numbers, the largest first. Only those near the largest are sorted.
function largest(numbers, k) {
  let found = [], cut = numbers.reduce((a, b) => a > b ? a : b)
  while (found.length < Math.min(k, numbers.length)) {
    cut -= 2
    found = []
    for (let i = 0; i < numbers.length; i++) if (numbers[i] >= cut) found.push(i)
  }
  return found.sort((a, b) => numbers[b] - numbers[a] || a - b).slice(0, k)
}

// One of the k most likely rows; `random` is from 0 up to 1. At temperature 0 it is the most likely one.
function sample(logits, k, temperature, random) {
  const top = largest(logits, temperature < 1e-6 ? 1 : k)
  const weights = top.map(row => exp((logits[row] - logits[top[0]]) / (temperature || 1)))
  let rest = random * weights.reduce((a, b) => a + b)
  return top.find((_, i) => (rest -= weights[i]) < 0) ?? top[0]
}

// A random number from 0 up to 1 for each position of the story with a seed: a hash of both (Appleby's MurmurHash3).
function random(seed, position) {
  const mix = (h, shift, factor) => Math.imul(h ^ h >>> shift, factor)
  const hash = h => { h = mix(mix(h, 16, 0x85ebca6b), 13, 0xc2b2ae35); return h ^ h >>> 16 }
  return (hash(hash(seed + 1) + position) >>> 0) / 2 ** 32
}
