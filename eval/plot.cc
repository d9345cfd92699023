#include "eval/plot.h"

#include <algorithm>
#include <cmath>

#include "fmt/format.h"

namespace gloam {
namespace {

constexpr int kWidth = 760, kHeight = 480;
constexpr int kLeft = 80, kRight = 30, kTop = 48, kBottom = 60;

std::string Text(double x, double y, std::string_view anchor, std::string_view text,
                 std::string_view more = "") {
  return fmt::format(R"(<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>)"
                     "\n",
                     x, y, anchor, more, EscapeXml(text));
}

std::string Open(int width, int height, std::string_view title) {
  return fmt::format(
      R"(<svg xmlns="http://www.w3.org/2000/svg" width="{0}" height="{1}" viewBox="0 0 {0} {1}" )"
      R"(font-family="sans-serif" font-size="12">)"
      "\n"
      R"(<rect width="{0}" height="{1}" fill="white"/>)"
      "\n{2}",
      width, height, Text(width / 2.0, 26, "middle", title, R"( font-size="16")"));
}

// An axis: values to pixels, with a margin around the values and readable ticks.
class Axis {
 public:
  Axis(double low, double high, bool log, double from_pixel, double to_pixel)
      : log_(log), from_pixel_(from_pixel), to_pixel_(to_pixel) {
    low_ = Scale(low);
    high_ = Scale(high);
    const double margin =
        std::max((high_ - low_) * 0.08, log ? 0.1 : std::abs(high_) * 0.02 + 1e-9);
    low_ -= margin;
    high_ += margin;
  }

  double Pixel(double value) const {
    const double share = (Scale(value) - low_) / (high_ - low_);
    return from_pixel_ + std::clamp(share, 0.0, 1.0) * (to_pixel_ - from_pixel_);
  }

  std::vector<double> Ticks() const {
    std::vector<double> ticks;
    if (!log_) {
      const double step = NiceStep((high_ - low_) / 5);
      for (double i = std::ceil(low_ / step); i * step <= high_; ++i) ticks.push_back(i * step);
      return ticks;
    }
    const bool wide = high_ - low_ > 2.5;  // decades: then 2 and 5 would crowd
    for (double decade = std::floor(low_); decade <= std::ceil(high_); ++decade) {
      for (const double digit : {1.0, 2.0, 5.0}) {
        const double value = digit * std::pow(10, decade);
        if (wide && digit != 1) continue;
        if (Scale(value) >= low_ && Scale(value) <= high_) ticks.push_back(value);
      }
    }
    return ticks;
  }

 private:
  static double NiceStep(double step) {
    const double decade = std::pow(10, std::floor(std::log10(step)));
    for (const double digit : {1.0, 2.0, 5.0}) {
      if (digit * decade >= step) return digit * decade;
    }
    return 10 * decade;
  }
  double Scale(double value) const { return log_ ? std::log10(std::max(value, 1e-12)) : value; }

  bool log_;
  double from_pixel_, to_pixel_;
  double low_ = 0, high_ = 1;
};

std::string TickLabel(double value) {
  return std::abs(value) < 1e-12 ? "0" : fmt::format("{:.4g}", value);
}

std::string_view Colour(PlotPoint::Kind kind) {
  switch (kind) {
    case PlotPoint::Kind::kDense:
      return "#444444";
    case PlotPoint::Kind::kPolicy:
      return "#1f6fb4";
    case PlotPoint::Kind::kControl:
      return "#d9822b";
  }
  return "#000000";
}

struct Range {
  double low = 0, high = 1;
};

// Of the values that the axis can show.
template <typename Get>
Range RangeOf(const std::vector<PlotPoint>& points, bool log, Get get) {
  bool found = false;
  Range range;
  for (const PlotPoint& point : points) {
    const double value = get(point);
    if (!std::isfinite(value) || (log && value <= 0)) continue;
    range.low = found ? std::min(range.low, value) : value;
    range.high = found ? std::max(range.high, value) : value;
    found = true;
  }
  return range;
}

std::string Axes(const ScatterPlot& plot, const Axis& x, const Axis& y) {
  const int right = kWidth - kRight, bottom = kHeight - kBottom;
  std::string svg = fmt::format(R"(<path d="M{0} {1}V{2}H{3}" fill="none" stroke="black"/>)"
                                "\n",
                                kLeft, kTop, bottom, right);
  for (const double tick : x.Ticks()) {
    svg += fmt::format(R"(<path d="M{:.1f} {}v5" stroke="black"/>)", x.Pixel(tick), bottom);
    svg += Text(x.Pixel(tick), bottom + 18, "middle", TickLabel(tick));
  }
  for (const double tick : y.Ticks()) {
    svg += fmt::format(R"(<path d="M{} {:.1f}h-5" stroke="black"/>)", kLeft, y.Pixel(tick));
    svg +=
        fmt::format(R"(<path d="M{} {:.1f}H{}" stroke="#e4e4e4"/>)", kLeft, y.Pixel(tick), right);
    svg += Text(kLeft - 9, y.Pixel(tick) + 4, "end", TickLabel(tick));
  }
  svg += Text((kLeft + right) / 2.0, kHeight - 18, "middle", plot.x_label);
  const double middle = (kTop + bottom) / 2.0;
  svg += Text(18, middle, "middle", plot.y_label,
              fmt::format(R"x( transform="rotate(-90 18 {:.1f})")x", middle));
  return svg;
}

// The vertical places of the labels, moved apart where they would overlap.
std::vector<double> LabelPlaces(const std::vector<std::pair<double, double>>& at) {
  constexpr double kApart = 13, kNear = 150;
  std::vector<double> places(at.size());
  std::vector<size_t> order(at.size());
  for (size_t i = 0; i < at.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return at[a].second < at[b].second; });
  for (size_t i = 0; i < order.size(); ++i) {
    double place = at[order[i]].second;
    for (size_t j = 0; j < i; ++j) {
      const bool near = std::abs(at[order[i]].first - at[order[j]].first) < kNear;
      if (near && place < places[order[j]] + kApart && place > places[order[j]] - kApart) {
        place = places[order[j]] + kApart;
      }
    }
    places[order[i]] = place;
  }
  return places;
}

// Red over yellow to green.
std::string CellColour(double value) {
  const double share = std::clamp(value, 0.0, 1.0);
  const double red = share < 0.5 ? 1 : 2 * (1 - share);
  const double green = share < 0.5 ? 2 * share : 1;
  const auto channel = [](double x) { return static_cast<int>(std::lround(90 + 140 * x)); };
  return fmt::format("#{:02x}{:02x}5a", channel(red), channel(green));
}

}  // namespace

std::string EscapeXml(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      default:
        if (static_cast<unsigned char>(c) >= 0x20) out += c;
    }
  }
  return out;
}

std::string RenderScatter(const ScatterPlot& plot) {
  const auto x_range = RangeOf(plot.points, true, [](const PlotPoint& p) { return p.x; });
  const auto y_range = RangeOf(plot.points, plot.log_y, [](const PlotPoint& p) { return p.y; });
  const Axis x(std::max(x_range.low, 1e-9), x_range.high, true, kLeft, kWidth - kRight);
  const Axis y(y_range.low, y_range.high, plot.log_y, kHeight - kBottom, kTop);
  std::string svg = Open(kWidth, kHeight, plot.title) + Axes(plot, x, y);
  std::vector<std::pair<double, double>> at;
  for (const PlotPoint& point : plot.points) {
    at.emplace_back(x.Pixel(point.x), y.Pixel(point.y));
    if (point.kind == PlotPoint::Kind::kDense) {
      svg += fmt::format(R"(<path d="M{} {:.1f}H{}" stroke="#444444" stroke-dasharray="5 4"/>)"
                         "\n",
                         kLeft, at.back().second, kWidth - kRight);
    }
  }
  const auto places = LabelPlaces(at);
  for (size_t i = 0; i < at.size(); ++i) {
    const auto [px, py] = at[i];
    const std::string_view colour = Colour(plot.points[i].kind);
    svg += fmt::format(R"(<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="{}"/>)", px, py, colour);
    const bool left = px > kWidth * 0.7;
    svg += Text(left ? px - 8 : px + 8, places[i] + 4, left ? "end" : "start", plot.points[i].label,
                fmt::format(R"( fill="{}")", colour));
  }
  return svg + "</svg>\n";
}

std::string RenderHeatMap(const HeatMap& map) {
  constexpr int kCellWidth = 62, kCellHeight = 30, kMapLeft = 90, kMapTop = 48;
  const int right = kMapLeft + kCellWidth * static_cast<int>(map.columns.size());
  const int bottom = kMapTop + kCellHeight * static_cast<int>(map.rows.size());
  // Wide enough for the title, whatever the number of columns.
  const int width = std::max(right + 20, static_cast<int>(map.title.size()) * 9 + 40);
  std::string svg = Open(width, bottom + 56, map.title);
  for (size_t row = 0; row < map.rows.size(); ++row) {
    const double top = kMapTop + kCellHeight * static_cast<double>(row);
    svg += Text(kMapLeft - 8, top + kCellHeight / 2.0 + 4, "end", map.rows[row]);
    for (size_t column = 0; column < map.columns.size(); ++column) {
      const double left = kMapLeft + kCellWidth * static_cast<double>(column);
      const auto& value = map.values[row * map.columns.size() + column];
      svg +=
          fmt::format(R"(<rect x="{}" y="{}" width="{}" height="{}" fill="{}" stroke="white"/>)",
                      left, top, kCellWidth, kCellHeight, value ? CellColour(*value) : "#dddddd");
      if (value) {
        svg += Text(left + kCellWidth / 2.0, top + kCellHeight / 2.0 + 4, "middle",
                    fmt::format("{:.0f}", *value * 100));
      }
    }
  }
  for (size_t column = 0; column < map.columns.size(); ++column) {
    svg += Text(kMapLeft + kCellWidth * (static_cast<double>(column) + 0.5), bottom + 18, "middle",
                map.columns[column]);
  }
  svg += Text((kMapLeft + right) / 2.0, bottom + 42, "middle", map.x_label);
  const double middle = (kMapTop + bottom) / 2.0;
  svg += Text(18, middle, "middle", map.y_label,
              fmt::format(R"x( transform="rotate(-90 18 {:.1f})")x", middle));
  return svg + "</svg>\n";
}

}  // namespace gloam
