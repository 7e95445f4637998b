// Byte-level BPE, as tiktoken does it. A byte is a character with a code from 0 to 255.
"use strict"

// GPT-2's pattern, which splits text into words. JavaScript's \s has U+FEFF, but not U+0085.
const WORD = RegExp(String.raw`'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+)|\s+(?!\S)|\s`
  .replaceAll("\\s", "\\p{White_Space}").replaceAll("\\S", "\\P{White_Space}"), "gu")

class Tokenizer {
  constructor(vocabulary) {  // the bytes of each token, "" for one that is not text
    this.vocabulary = vocabulary
    this.ranks = new Map(vocabulary.map((token, id) => [token, id]))
  }

  encode(text) {
    const bytes = word => Array.from(new TextEncoder().encode(word), byte => String.fromCharCode(byte))
    return (text.toWellFormed().match(WORD) ?? []).flatMap(word => this.merge(bytes(word)))
  }

  // The tokens of a word: of its bytes, again and again the pair that makes the lowest token is merged.
  merge(parts) {
    if (this.ranks.has(parts.join(""))) return [this.ranks.get(parts.join(""))]
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

  // A function that decodes one token after the other, and returns the text that is complete with each.
  decoder() {
    const decoder = new TextDecoder("utf-8", {ignoreBOM: true})
    return id => decoder.decode(Uint8Array.from(this.vocabulary[id], byte => byte.charCodeAt(0)), {stream: true})
  }
}
