// Products of matrices with vectors. They take most of the time of a GPT, so they are in WebAssembly's vector
// instructions: several times faster than JavaScript, and as exact in every browser.
"use strict"

const padded = n => Math.ceil(n / 4) * 4  // an instruction computes with four numbers

// Matrices of float32, in a memory that the machine code can read.
class Matrices {
  // shapes: [columns, rows] of all matrices that will be made
  constructor(shapes) {
    const columns = Math.max(...shapes.map(shape => shape[0])), rows = padded(Math.max(...shapes.map(shape => shape[1])))
    const size = [...shapes, [columns, 4], [4, rows]].reduce((sum, [c, r]) => sum + padded(c) * r, 0)
    this.memory = new WebAssembly.Memory({initial: Math.ceil(4 * size / 2 ** 16)})  // in pages of 64 KiB
    this.used = 0  // bytes
    this.x = this.make(columns, 1).data
    this.sums = this.make(4, rows).data
    const module = new WebAssembly.Module(machineCode())
    this.multiply = new WebAssembly.Instance(module, {js: {memory: this.memory}}).exports.multiply
  }

  // A matrix of zeros. `stride` is the length of a row in `data`.
  make(columns, rows) {
    const stride = padded(columns), data = new Float32Array(this.memory.buffer, this.used, rows * stride)
    this.used += data.byteLength
    return {data, rows, stride, row: r => data.subarray(r * stride, r * stride + columns)}
  }

  // The product of a matrix with x, or of its first `rows` rows: (rows)
  linear({data, stride, rows: all}, x, rows = all) {
    const {sums} = this, start = this.x.byteOffset, y = new Float64Array(rows)
    this.x.set(x)
    this.x.fill(0, x.length, padded(x.length))
    this.multiply(data.byteOffset, 4 * stride, start, start + 4 * x.length, sums.byteOffset, rows)
    for (let r = 0, i = 0; r < rows; r++, i += 4) y[r] = sums[i] + sums[i + 1] + sums[i + 2] + sums[i + 3]
    return y
  }
}

// A WebAssembly module with the function multiply(matrix, stride, x, xEnd, sums, rows); all but `rows` are in bytes. For
// each row it writes four sums: of the products 0, 4, 8, … with x, of 1, 5, 9, …, and so on. It computes four rows at a
// time, so that an addition need not wait for the one before.
function machineCode() {
  const [MATRIX, STRIDE, X, X_END, SUMS, ROWS, AT, ROW, SUM, FOUR] = [0, 1, 2, 3, 4, 5, 6, 7, 11, 15]  // variables
  const get = variable => [0x20, variable], set = variable => [0x21, variable]
  const int = n => n < 64 ? [0x41, n] : [0x41, n % 128 + 128, n >> 7], add = 0x6a, subtract = 0x6b, shift = 0x74
  const zeros = [0x43, 0, 0, 0, 0, 0xfd, 0x13], load = [0xfd, 0x00, 2, 0], store = offset => [0xfd, 0x0b, 2, offset]
  const addFours = [0xfd, 0xe4, 1], multiplyFours = [0xfd, 0xe6, 1]
  const loop = [0x03, 0x40], isLess = 0x49, isGreater = 0x4a, repeatIf = [0x0d, 0], end = 0x0b
  const each = code => [0, 1, 2, 3].map(code)
  const code = [2, 5, 0x7f, 5, 0x7b,  // two kinds of local variables: five integers, five times four numbers
    loop,
      each(k => [k ? [get(ROW + k - 1), get(STRIDE), add] : get(MATRIX), set(ROW + k), zeros, set(SUM + k)]),
      get(X), set(AT),
      loop,
        get(AT), load, set(FOUR),
        each(k => [get(SUM + k), get(ROW + k), load, get(FOUR), multiplyFours, addFours, set(SUM + k),
                   get(ROW + k), int(16), add, set(ROW + k)]),
        get(AT), int(16), add, set(AT), get(AT), get(X_END), isLess, repeatIf,
      end,
      each(k => [get(SUMS), get(SUM + k), store(16 * k)]),
      get(SUMS), int(64), add, set(SUMS), get(MATRIX), get(STRIDE), int(2), shift, add, set(MATRIX),
      get(ROWS), int(4), subtract, set(ROWS), get(ROWS), int(0), isGreater, repeatIf,
    end, end].flat(Infinity)
  const size = n => [n % 128 + 128, n >> 7]
  return new Uint8Array([0, 0x61, 0x73, 0x6d, 1, 0, 0, 0,  // "\0asm", version 1
    1, 10, 1, 0x60, 6, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0,  // a type of function, of six integers
    2, 14, 1, 2, ...bytes("js"), 6, ...bytes("memory"), 2, 0, 1, 3, 2, 1, 0,  // what is imported; one function
    7, 12, 1, 8, ...bytes("multiply"), 0, 0,  // what is exported
    10, ...size(code.length + 3), 1, ...size(code.length), ...code])
}

const bytes = text => [...text].map(c => c.charCodeAt(0))
