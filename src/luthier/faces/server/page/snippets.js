// A conversation as a command or a program that asks the same.
import { hasKey } from "./api.js";

export function asCurl(body) {
  const key = hasKey() ? ` \\\n  -H "Authorization: Bearer $LUTHIER_KEY"` : "";
  return `curl ${location.origin}/v1/chat/completions${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(body))}\n`;
}

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

export function asPython(body) {
  const key = hasKey() ? 'os.environ["LUTHIER_KEY"]' : '"none"';
  const lines = Object.entries(body).map(([name, value]) => `    ${name}=${literal(value, 4)},`);
  return `${hasKey() ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key=${key})
answer = client.chat.completions.create(
${lines.join("\n")}
)
print(answer.choices[0].message.content)
`;
}

// A value as Python writes it. JSON's strings are Python's, but for lone surrogates, which JSON.stringify escapes as Python does.
function literal(value, indent) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = " ".repeat(indent + 4), array = Array.isArray(value);
  const parts = array
    ? value.map((one) => literal(one, indent + 4))
    : Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one, indent + 4)}`);
  const [open, close] = array ? "[]" : "{}";
  const line = open + parts.join(", ") + close;
  if (line.length + indent < 90 && !line.includes("\n")) return line;
  return `${open}\n${parts.map((part) => `${inner}${part},`).join("\n")}\n${" ".repeat(indent)}${close}`;
}
