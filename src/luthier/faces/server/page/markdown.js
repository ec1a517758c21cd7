// The Markdown that models write most: code, headings, lists, quotes, bold, italic. Nodes are built, HTML is never read; links
// stay text, so that no answer leads anywhere.
import { make } from "./dom.js";

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+)(.*)$/;

export function render(text) {
  const lines = text.split("\n"), found = document.createDocumentFragment();
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = /^\s*```\s*([\w+#.-]*)/.exec(line);
    if (fence) {
      const end = lines.findIndex((one, place) => place > at && /^\s*```\s*$/.test(one));
      const stop = end < 0 ? lines.length : end;
      found.append(make("pre", { tabindex: "0" }, make("code", { text: lines.slice(at + 1, stop).join("\n") })));
      at = stop + 1;
    } else if (ITEM.test(line)) {
      let stop = at;
      while (stop < lines.length && (ITEM.test(lines[stop]) || /^\s{2,}\S/.test(lines[stop]))) stop++;
      found.append(list(lines.slice(at, stop)));
      at = stop;
    } else if (/^#{1,6}\s/.test(line)) {
      found.append(inline(make("p", { class: "heading" }), line.replace(/^#+\s+/, "")));
      at++;
    } else if (/^>\s?/.test(line)) {
      let stop = at;
      while (stop < lines.length && lines[stop].startsWith(">")) stop++;
      found.append(make("blockquote", {}, render(lines.slice(at, stop).map((one) => one.replace(/^>\s?/, "")).join("\n"))));
      at = stop;
    } else if (!line.trim()) {
      at++;
    } else {
      let stop = at + 1;
      while (stop < lines.length && lines[stop].trim() && !/^(\s*```|#{1,6}\s|>)/.test(lines[stop]) && !ITEM.test(lines[stop])) stop++;
      found.append(inline(make("p"), lines.slice(at, stop).join("\n")));
      at = stop;
    }
  }
  return found;
}

// Lines that are further in than the first item belong to the item above them.
function list(lines) {
  const [, margin, mark, gap] = ITEM.exec(lines[0]), depth = (margin + mark + gap).length;
  const root = make(/\d/.test(mark) ? "ol" : "ul", /\d/.test(mark) ? { start: parseInt(mark) } : {});
  let inner = [];
  const close = () => {
    if (inner.length && root.lastChild) root.lastChild.append(render(inner.join("\n")));
    inner = [];
  };
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= margin.length) {
      close();
      root.append(inline(make("li"), item[4]));
    } else {
      inner.push(line.slice(Math.min(depth, line.search(/\S|$/))));
    }
  }
  close();
  return root;
}

const INLINE = /(`+)(.+?)\1(?!`)|\*\*(?=\S)(.+?\S|\S)\*\*|(?<![\w*])\*(?=[^\s*])([^*\n]*[^\s*])\*(?![\w*])/gs;

function inline(element, text) {
  let last = 0;
  for (const found of text.matchAll(INLINE)) {
    element.append(text.slice(last, found.index));
    if (found[1]) element.append(make("code", { text: found[2] }));
    else element.append(inline(make(found[3] ? "strong" : "em"), found[3] || found[4]));
    last = found.index + found[0].length;
  }
  element.append(text.slice(last));
  return element;
}
