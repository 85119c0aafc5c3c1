"Sphinx's settings for the documentation; `make docs` gathers the pages first (tools/docs.py)."
import histokit

project, author, copyright = "histokit", "the histokit authors", "2026 onwards, the histokit authors"
version = release = histokit.__version__
extensions = ["myst_nb"]
exclude_patterns = ["_build"]
html_theme, html_title = "furo", f"histokit {release}"
html_static_path, html_css_files = ["_static"], ["histokit.css"]
html_show_sourcelink = False

nb_execution_mode = "off"                       # pages are shown as they are saved
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]     # a story may begin a section one level deeper
