// Markdown as HTML. HTML in it stays text, and links only lead to http, https and mailto: the writer is a model.

import MarkdownIt from "markdown-it";

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: false });
markdown.validateLink = (url) => /^(https?:|mailto:)/i.test(url.trim());
// Pictures would be fetched from wherever the model says.
markdown.disable("image");
const open = markdown.renderer.rules.link_open;
markdown.renderer.rules.link_open = (tokens, index, options, env, self) => {
  tokens[index]?.attrSet("target", "_blank");
  tokens[index]?.attrSet("rel", "noopener noreferrer");
  return open ? open(tokens, index, options, env, self) : self.renderToken(tokens, index, options);
};

export function html(text: string): string {
  return markdown.render(text);
}
