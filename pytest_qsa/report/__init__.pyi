from .card import model_card as model_card
from .comparison import (
    Column as Column,
    Comparison as Comparison,
    Size as Size,
    comparison_of as comparison_of,
)
from .comparison_forms import (
    comparison_csv as comparison_csv,
    comparison_lines as comparison_lines,
    comparison_markdown as comparison_markdown,
    comparison_page as comparison_page,
)
from .history import (
    History as History,
    Point as Point,
    Track as Track,
    history_csv as history_csv,
    history_lines as history_lines,
    history_markdown as history_markdown,
    history_page as history_page,
    history_plot as history_plot,
)
from .html import (
    Gallery as Gallery,
    GallerySurface as GallerySurface,
    PagePicture as PagePicture,
    contrast as contrast,
    render as render,
    render_gallery as render_gallery,
    surface_data as surface_data,
)
from .plots.chart import chart_of as chart_of
from .plots.curves import curves_of as curves_of, drawn_by_page as drawn_by_page
from .plots.depth import evenly_spread as evenly_spread
from .plots.elements import (
    BOX_SHARES as BOX_SHARES,
    box_figure as box_figure,
    histogram_figure as histogram_figure,
    map_figure as map_figure,
    percentile_figure as percentile_figure,
    surface_figure as surface_figure,
)
from .plots.figures import draw as draw
from .plots.magnitudes import (
    STATS as STATS,
    Outliers as Outliers,
    magnitude_panels as magnitude_panels,
    magnitude_title as magnitude_title,
    outlier_picture as outlier_picture,
    outliers_of as outliers_of,
    texts_of as texts_of,
)
from .plots.style import (
    encode_figure as encode_figure,
    population as population,
    samples_of as samples_of,
)
from .report import (
    PlainVerdict as PlainVerdict,
    read_report as read_report,
    strict_json as strict_json,
    to_plain as to_plain,
    write_run as write_run,
)
from .verdict_text import (
    annotation_lines as annotation_lines,
    append_summary as append_summary,
    attach as attach,
    comment as comment,
    context_text as context_text,
    failure_text as failure_text,
    properties_of as properties_of,
    shared_layers as shared_layers,
    styled_lines as styled_lines,
    takes_pictures as takes_pictures,
    worst_layer as worst_layer,
)
