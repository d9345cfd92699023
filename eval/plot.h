// Pictures of results as SVG text. Pure functions.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace gloam {

struct PlotPoint {
  enum class Kind { kDense, kPolicy, kControl };
  std::string label;
  double x = 0;  // above 0
  double y = 0;
  Kind kind = Kind::kPolicy;
};

struct ScatterPlot {
  std::string title;
  std::string x_label;  // on a logarithmic axis
  std::string y_label;
  bool log_y = false;  // then points with y of 0 or less lie on the axis
  std::vector<PlotPoint> points;
};

// Points with their labels; a dashed line at the dense one's y.
std::string RenderScatter(const ScatterPlot& plot);

struct HeatMap {
  std::string title;
  std::string x_label;
  std::string y_label;
  std::vector<std::string> columns;
  std::vector<std::string> rows;
  std::vector<std::optional<double>> values;  // [rows][columns] from 0 to 1; empty: no result
};

// Cells from red (0) over yellow to green (1), each with its value in per cent.
std::string RenderHeatMap(const HeatMap& map);

// `text` for use in XML.
std::string EscapeXml(std::string_view text);

}  // namespace gloam
