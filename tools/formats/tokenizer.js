// Byte-level BPE, as tiktoken does it. Bytes are strings whose characters have the codes 0 to 255.
"use strict"

// GPT-2's pattern, which splits text into words. \s would also match U+FEFF, and not U+0085.
const WORD = new RegExp("'(?:[sdmt]|ll|ve|re)| ?(?:\\p{L}+|\\p{N}+|[^\\p{White_Space}\\p{L}\\p{N}]+)" +
                        "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}", "gu")

class Tokenizer {
  // vocabulary: the bytes of each token, in the order of the ids; "" for tokens that are not text.
  constructor(vocabulary) {
    this.bytes = vocabulary.map(token => Uint8Array.from(token, byte => byte.charCodeAt(0)))
    this.ranks = new Map(vocabulary.map((token, id) => [token, id]))
  }

  encode(text) {
    const words = text.toWellFormed().match(WORD) ?? []
    return words.flatMap(word => this.merge(Array.from(new TextEncoder().encode(word), byte => String.fromCharCode(byte))))
  }

  // The tokens of a word: single bytes at first; then again and again the pair that makes the lowest token is merged.
  merge(parts) {
    const word = this.ranks.get(parts.join(""))
    if (word !== undefined) return [word]
    const rank = i => i + 1 < parts.length ? this.ranks.get(parts[i] + parts[i + 1]) ?? Infinity : Infinity
    const ranks = parts.map((_, i) => rank(i))  // of the pair that begins at each part
    for (;;) {
      let best = 0
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i
      if (ranks[best] === Infinity) return parts.map(part => this.ranks.get(part))
      parts.splice(best, 2, parts[best] + parts[best + 1])
      ranks.splice(best, 1)
      ranks[best] = rank(best)
      if (best) ranks[best - 1] = rank(best - 1)
    }
  }

  // A function that decodes token after token, and returns the text that is complete with each.
  decoder() {
    const decoder = new TextDecoder("utf-8", {ignoreBOM: true})
    return token => decoder.decode(this.bytes[token], {stream: true})
  }
}
