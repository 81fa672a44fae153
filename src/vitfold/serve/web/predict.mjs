// Labels of pictures in Node, with the files of this folder:
//   npm install --ignore-scripts onnxruntime-node sharp
//   node predict.mjs [--threads N] [--logits] PICTURE...
// One line of JSON for each picture.
import {readFileSync} from "node:fs";
import {fileURLToPath} from "node:url";
import {parseArgs} from "node:util";
import ort from "onnxruntime-node";
import sharp from "sharp";
import {answer, prepare} from "./preprocess.js";

const here = name => fileURLToPath(new URL(name, import.meta.url));
const about = JSON.parse(readFileSync(here("bundle.json"), "utf8"));
const {values, positionals} = parseArgs({
  options: {threads: {type: "string", default: "0"}, logits: {type: "boolean", default: false}},
  allowPositionals: true,
});
const session = await ort.InferenceSession.create(here(about.model), {intraOpNumThreads: Number(values.threads)});

for (const image of positionals) {
  let opened = sharp(image);
  if (about.preprocess.exif === "apply") opened = opened.rotate();
  const {data, info} = await opened.toColourspace("srgb").removeAlpha().raw().toBuffer({resolveWithObject: true});
  const pixels = prepare(data, info.height, info.width, about.preprocess);
  const fed = {[about.input]: new ort.Tensor("float32", pixels, [1, 3, ...about.preprocess.crop_size])};
  const output = (await session.run(fed))[about.output].data;
  console.log(JSON.stringify({image, ...(values.logits ? {output: Array.from(output)} : {top: answer(output, about)})}));
}
