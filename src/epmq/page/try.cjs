// Run by node when a page is made: what the page makes of some inputs. They come on standard input, as JSON.
"use strict";
const { kind, scripts, settings, examples } = JSON.parse(require("fs").readFileSync(0, "utf8"));

function made() {
  if (kind === "text") {
    const { encodeText } = require(scripts.text);
    const tokenizer = new (require(scripts.tokenizers).Tokenizer)(settings.tokenizer, settings.config);
    return examples.map((text) => encodeText(tokenizer, text, settings).ids);
  }
  const { preparedPicture } = require(scripts.picture);
  return examples.map((picture) => {
    const { width, height, values } = preparedPicture(picture, settings);
    return { width, height, values: Array.from(values) };
  });
}

console.log(JSON.stringify(made()));
