// Products of matrices with vectors, where a GPT spends most of its time. They use WebAssembly's vector instructions: a
// small model is then twice as fast as in JavaScript, and a seed still gives the same story in every browser.
"use strict"

const padded = n => Math.ceil(n / 4) * 4  // an instruction computes with four numbers

// The memory of matrices of float32, which the machine code can read. `shapes`: [rows, columns] of all of them.
class Memory {
  constructor(shapes) {
    const most = i => Math.max(...shapes.map(shape => shape[i]))
    const own = [[1, most(1)], [most(0), 4]], size = ([rows, columns]) => padded(rows) * padded(columns)
    const bytes = 4 * [...shapes, ...own].map(size).reduce((a, b) => a + b)
    this.memory = new WebAssembly.Memory({initial: Math.ceil(bytes / 2 ** 16)})  // in pages of 64 KiB
    this.used = 0  // bytes
    ;[this.x, this.sums] = own.map(shape => this.matrix(...shape).data)
    const module = new WebAssembly.Module(machineCode())
    this.multiply = new WebAssembly.Instance(module, {js: {memory: this.memory}}).exports.multiply
  }

  // A matrix of zeros; `row(r)` is a part of its memory.
  matrix(rows, columns) {
    const stride = padded(columns), data = new Float32Array(this.memory.buffer, this.used, padded(rows) * stride)
    this.used += data.byteLength
    return {memory: this, rows, stride, data, row: r => data.subarray(r * stride, r * stride + columns)}
  }
}

// The product of x with the first `n` rows of a matrix, plus the bias: (n)
function linear(x, {memory, rows, stride, data}, bias, n = rows) {
  const {sums} = memory, start = memory.x.byteOffset, y = new Float64Array(n)
  memory.x.set(x)
  memory.x.fill(0, x.length, padded(x.length))
  memory.multiply(data.byteOffset, 4 * stride, start, start + 4 * x.length, sums.byteOffset, n)
  for (let r = 0, i = 0; r < n; r++, i += 4) y[r] = sums[i] + sums[i + 1] + sums[i + 2] + sums[i + 3]
  return bias ? add(y, bias) : y
}

// A WebAssembly module with the function multiply(matrix, stride, x, xEnd, sums, rows); all but `rows` are in bytes.
// For each row it writes four sums: of the products 0, 4, 8, … with x, of 1, 5, 9, …, and so on. It computes four rows
// at a time, because an addition to a sum has to wait for the one before.
function machineCode() {
  const [MATRIX, STRIDE, X, X_END, SUMS, ROWS, AT, ROW, SUM, FOUR] = [0, 1, 2, 3, 4, 5, 6, 7, 11, 15]  // variables
  const get = variable => [0x20, variable], set = variable => [0x21, variable]
  const int = n => n < 64 ? [0x41, n] : [0x41, n % 128 + 128, n >> 7], add = 0x6a, subtract = 0x6b, shift = 0x74
  const zeros = [0x43, 0, 0, 0, 0, 0xfd, 0x13], load = [0xfd, 0x00, 2, 0], store = offset => [0xfd, 0x0b, 2, offset]
  const addFours = [0xfd, 0xe4, 1], multiplyFours = [0xfd, 0xe6, 1]
  const loop = [0x03, 0x40], isLess = 0x49, isGreater = 0x4a, repeatIf = [0x0d, 0], end = 0x0b
  const each = code => [0, 1, 2, 3].map(code)
  const code = [2, 5, 0x7f, 5, 0x7b,  // local variables: five integers, five times four numbers
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
  const size = n => [n % 128 + 128, n >> 7], name = text => [text.length, ...Array.from(text, c => c.charCodeAt(0))]
  return new Uint8Array([0, ...name("asm").slice(1), 1, 0, 0, 0,  // version 1
    1, 10, 1, 0x60, 6, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0x7f, 0,  // a type of function, of six integers
    2, 14, 1, ...name("js"), ...name("memory"), 2, 0, 1,  // imports
    3, 2, 1, 0, 7, 12, 1, ...name("multiply"), 0, 0,  // a function, which is exported
    10, ...size(code.length + 3), 1, ...size(code.length), ...code])
}
