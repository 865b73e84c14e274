// From a text to the inputs of the model, as the Python tokenizer makes them.
"use strict";

// Ids of the tokens and of their types. A text of too many tokens is cut before special tokens are put around it.
function encodeText(tokenizer, text, settings) {
  const whole = tokenizer.encode(text, { return_token_type_ids: true });
  const types = whole.token_type_ids ?? whole.ids.map(() => 0);
  const excess = settings.limit === null ? 0 : whole.ids.length - settings.limit;
  if (excess <= 0) return { ids: whole.ids, types };
  const inner = tokenizer.encode(text, { add_special_tokens: false }).ids;
  const before = leadingSpecials(whole.ids, inner);
  const from = settings.cut === "left" ? before : before + Math.max(0, inner.length - excess);
  const kept = (_, place) => place < from || place >= from + excess;
  return { ids: whole.ids.filter(kept), types: types.filter(kept) };
}

// How many special tokens stand before those of the text.
function leadingSpecials(whole, inner) {
  for (let place = 0; place + inner.length <= whole.length; place++) {
    if (inner.every((id, offset) => whole[place + offset] === id)) return place;
  }
  return 0;
}

// Name of an input of the model → its values, and their shape.
function textInputs(tokenizer, text, settings) {
  const { ids, types } = encodeText(tokenizer, text, settings);
  const values = { input_ids: ids, attention_mask: ids.map(() => 1), token_type_ids: types };
  const shape = [1, ids.length];
  const inputs = Object.entries(values).map(([name, numbers]) => [
    name, { type: "int64", data: BigInt64Array.from(numbers, BigInt), shape },
  ]);
  return Object.fromEntries(inputs);
}

if (typeof module !== "undefined") module.exports = { encodeText };
